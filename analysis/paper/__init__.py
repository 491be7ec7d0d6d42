"""The claims of An, Lu, Ying: each module computes the tables and numbers behind one figure."""
