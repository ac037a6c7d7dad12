"""A page to look at trainings with, while they run and after."""
