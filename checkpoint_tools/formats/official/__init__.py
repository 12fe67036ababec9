"""The official repositories' files: one .pth, files per rank of Swin-MoE, and those of Tutel, SimMIM and FairScale.

layout.py has the shapes, read.py and write.py the way of a state dict, state.py the optimizer's and the run's part.
Their rows are in checkpoint_tools.formats.FORMATS, each a file with detect, open_... and write_... here.
"""
