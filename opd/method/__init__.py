"""The method: the step, objectives, the teacher, curricula."""
