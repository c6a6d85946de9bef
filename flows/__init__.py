"""What happens, in order: one flow a stage, and the pipeline of them all."""

from tasks.run.logs import set_up_logs

set_up_logs()
