"""The experiments of UIPE (arXiv 2503.04693) on small models: what is measured, kept, judged and shown."""
