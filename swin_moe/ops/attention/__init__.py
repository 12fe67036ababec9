"""Attention in windows: reference.py is the obvious form, fused.py the compiled operator, half.py the whole block half.

choice.py measures which is fastest for a case (model.attention: auto), in_windows.py has the forms on windows that are
cut already, geometry.py says which token is in which window.
"""
