"""Downloads, sources of images, and the prepared dataset in batches. It knows the section `dataset`, not the study."""
