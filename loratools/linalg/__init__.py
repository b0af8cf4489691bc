"""Dense linear algebra on plain tensors: truncated SVD with a stated error, products through small cores, rank policies.

`svd` and `spectrum` take a dense difference, `product` a pair of factors, `exact` rebuilds a product with the same bits
anywhere, `ranks` chooses ranks from singular values. Nothing here knows of adapters or files; import the modules directly.
"""
