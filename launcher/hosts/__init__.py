"""Hosts: files and short forms that name them, and how many ranks each gets."""
