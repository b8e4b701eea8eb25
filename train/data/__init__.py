"""Files to packed batches: open_data(paths, tokenizer, ...) -> Loader of Batch.

files/   readers and tables (files to chunks) > records (chunks to rows) > formats (rows to training
         examples) > template (examples to tokens)
tokens/  encode (all of that for a chunk) > cache (chunks on disk, filled by pool) > dataset (chunks
         as one array)
pack/    mixture (weights of files) > spans (documents to spans) > packing (spans to rows of a
         batch; without regard for documents: stream)

Above them loader (rows to batches) and open (all of it); report counts every row that was read.
"""
