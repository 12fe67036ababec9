"""A network looked at in a browser (`swin-moe demo`, extra `demo`).

networks.py opens what is typed, a classifier or what finds things in images; look.py computes what is shown of one
image, draw.py makes pictures of it, app.py is the page (Gradio), command.py the command line. There is no table here. A
new view needs a function in draw.py and a tab in app.py.
"""
