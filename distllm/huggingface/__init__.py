"""Hugging Face folders: config.json (config.py), tensors (counterpart.py), files (read.py, write.py).

What a family is called and looks like there stands in its folder, `model/families/NAME/huggingface.py`.
"""
