"""What the engines load: one folder for each, and the transfer code they share."""
