"""Which rank does what, and where a piece of a parameter lies.

In reading order: grid.py (ranks as an array whose axes are those of config/axes.py); groups.py (its process
groups, made once, and the roles that they play), local_group.py (a group that only its members make),
megatron_state.py (the groups as Megatron Core's); tree.py (small objects of all ranks) and save_groups.py
(trees for checkpoints); dtypes.py; parameter.py (an entry of the table of parameters); place.py and
fragment.py (a rank's piece of one, and of its optimizer state); flat.py (buckets of ZeRO 0 and 1) and
whole.py (what ZeRO-3 keeps whole); traffic.py (what is counted of what ranks send). All but the groups is
arithmetic, without torch.
"""
