"""Every layout trains like one process."""
