"""What the example scripts share; a script in this folder's parent imports it as `support`."""
