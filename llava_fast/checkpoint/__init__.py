"""Every checkpoint layout, in and out.

Files of tensors (`weights`) are opened under our names and with a config of HF's kind (`layouts`, `reader`, `adapter`),
checked against the model (`strict`), and read into it (`load`); or a model is written (`save`) or made of two others
(`assemble`).
"""
