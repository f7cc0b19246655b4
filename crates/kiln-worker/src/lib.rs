//! Assembly: runs one lease from machine to receipt.
