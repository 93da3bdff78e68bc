"""The mathematics of both papers, on tensors. It opens no file and knows no network module and no study."""
