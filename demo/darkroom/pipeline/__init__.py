"""The walk of a prompt through loaded engines, to a picture."""
