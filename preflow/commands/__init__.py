"""The sub-commands, a file each; `preflow.cli.COMMANDS` names them."""
