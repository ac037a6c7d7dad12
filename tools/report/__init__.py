"""Write a page that shows training runs, while they run and after."""
