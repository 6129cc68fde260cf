"""nmsolve's masks inside other tools, one module for each; nothing is imported before it is used.

==================================  ==========================================================================
``nmsolve.integrations.``           for
==================================  ==========================================================================
``torch_prune``                     torch.nn.utils.prune
``torch_ao``                        torch.ao.pruning
``llmcompressor``                   llmcompressor's ``oneshot``
``modelopt``                        nvidia-modelopt's ``modelopt.torch.sparsity``
``apex_asp``                        apex ASP
``transformers``                    sparse training in transformers' ``Trainer``
``lightning``                       sparse training in Lightning's ``Trainer``
``scripts``                         scripts that compute a ``W_metric``, such as those of Wanda and SparseGPT
==================================  ==========================================================================
"""
