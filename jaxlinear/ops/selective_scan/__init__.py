"""The selective scan of Mamba and Longhorn: N state numbers per channel."""
