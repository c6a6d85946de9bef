"""`preflow down`."""

from pathlib import Path

from preflow.options import Folder


def down(file: Path | None = None, /, *, folder: Folder = Path(".demo")) -> None:
    """End everything that `preflow up` started; a run that this interrupts continues at the next `preflow up`.

    Parameters
    ----------
    file
        The config.yaml that `up` was given, if any.
    """
    from tasks.demo.up import Up

    root = (file.absolute().parent / ".preflow") if file else folder.absolute()
    print("ended" if Up(root).stop() else "nothing runs")
