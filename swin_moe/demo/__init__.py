"""A network looked at in a browser: look.py computes what is shown of one image, draw.py makes pictures of it, app.py
is the page (Gradio, extra `demo`), command.py the command line. A new view: a function in draw.py, a tab in app.py.
"""
