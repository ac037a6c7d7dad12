"""Write a page that shows trainings, while they run and after."""
