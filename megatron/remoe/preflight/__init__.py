"""What is looked at before a training starts, and the words when it cannot or ends in an error."""
