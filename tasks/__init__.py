"""The stages, and what they share; README.md is the map."""

from tasks.run.logs import set_up_logs

set_up_logs()
