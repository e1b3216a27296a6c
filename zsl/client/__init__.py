"""Client of a trunk: sessions on torch tensors, and the module in place of the trunk's layers.

Never imports the daemon's side.
"""
