"""Generation of unlabeled training images from prompts: prompt files, generators, folders."""
