"""Store files on this machine and at URLs.

content_store: immutable entries named by the hash of their inputs, checksummed, made once
files: atomic writes, fsync, file hashes, lock probes, cache folder
node_cache: bounded least-recently-used cache of remote entries on a node
remote_folder: a folder at a URL through pyarrow, with retries
remote_store: content-addressed entries at a URL
safetensors_files: headers of weight files, tensors read one at a time
scratch: temporary folders, removed by the next process where their own was killed
signals: hold back requests to end while something is done as a whole
"""

__all__ = ["content_store", "files", "node_cache", "remote_folder", "remote_store", "safetensors_files", "scratch", "signals"]
