"""What a model is asked to do: one file per task, registered in `TASKS`; modules with an underscore are shared helpers."""
