"""What two or more tools use."""
