"""Images with boxes, masks or label maps: data sets, moves of all of it together, and batches of different sizes.

The table is loader.DENSE_DATASETS. A new row needs the members of sample.DenseDataset; augment.py plans what a step
does to an image, geometry.py does it, collate.py makes the batch.
"""
