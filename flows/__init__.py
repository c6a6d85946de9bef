"""What happens, in order: one flow a stage, and the pipeline of them all."""
