"""From files on disk to training and evaluation samples.

label_space   the 19 classes and the lookup from each dataset's own ids to them
reading       one image or label file -> array
datasets      the table of datasets: where their files lie, how their labels are read
sample        the types that travel: Domain, Record, SourceSample, GeneratedSample, EvalSample
transforms    random resize, crop, color jitter, flip
mappers       one record -> one sample, a file per domain
targets       a label map -> one binary mask per class
loaders       the endless training stream and the test loader
"""
