//! QEMU's fw_cfg: what firmware and test kernels ask about their machine. So far the names of its files.

mod item;

pub use item::{
    E820_FILE, MAX_NAME_BYTES, MAX_USER_BYTES, MAX_USER_ITEMS, USER_PREFIX, UserItem,
    check_lengths, check_name, check_names,
};
