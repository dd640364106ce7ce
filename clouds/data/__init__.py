"""From files on disk to training and evaluation samples.

label_space     classes of a dataset: names, colors, words of the text classifier, ignore value
reading         decoding of image and label files, mapping of raw ids to train ids
datasets        descriptions of the builtin datasets, listing of their files, access by name
structures      types of records, samples and targets
augmentation    random augmentations of images and labels
dataset_mapper  one record -> one sample, a mapper per dataset role
build           training sampler, training and test loader
dataset_report  check of the files of a dataset
"""
