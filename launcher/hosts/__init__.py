"""Hosts: files and short forms that name them, and how many ranks each gets.

hostfile.py reads files, nodelist.py the short forms of schedulers, place.py deals ranks out. There is no table: another
dialect of hostfiles is a pattern in hostfile.py and a line of tests/launcher/hosts/test_hosts.py.
"""
