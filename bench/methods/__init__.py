"""The methods compared: protocols, their runs and what they come to."""
