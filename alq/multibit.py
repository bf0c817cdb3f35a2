class MultiBitWeight: pass
average_bitwidth=quantize=restore=storage_bytes=None
