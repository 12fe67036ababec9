"""Names of files that several layers look for: images, and what training writes into the folder of a run."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = ("train", "val")  # folders, lists or zip files of a data set
RUN_CONFIG, RECORDS = "config.yaml", "metrics.jsonl"  # of a run's folder
