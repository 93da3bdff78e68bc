"""Downloads, image sources, and the prepared dataset in batches. It knows the section `dataset`, not the study."""
