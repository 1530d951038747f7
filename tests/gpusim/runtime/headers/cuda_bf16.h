#pragma once  // NCCL names its types only
