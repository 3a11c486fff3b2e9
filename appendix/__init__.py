"""What makes the chapters fast, safe and convenient: one job a file.

A chapter can be read without any of them.
"""
