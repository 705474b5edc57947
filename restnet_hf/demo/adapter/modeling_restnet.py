from restnet_hf import RestNetConfig, StitchedModelForImageClassification  # pip install restnet-hf
