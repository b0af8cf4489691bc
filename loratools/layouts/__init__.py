"""Layouts: where one network has two sets of tensor names, a table that leads from one to the other."""
