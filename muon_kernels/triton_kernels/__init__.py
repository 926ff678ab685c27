"""The verbs in Triton, one file a verb: kernel and launcher. Importing the package brings no triton; its modules do."""
