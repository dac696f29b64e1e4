// All texts of the modules in this folder, by language and module. Nodes have theirs in locales/.
export const TEXTS = {
    en: {
        adopt: {
            adopt: "Swap loaders to run on all ranks (Ascend)",
            back: "Swap loaders back to core's (Ascend)",
            swapped: count => `${count} ${count === 1 ? "loader" : "loaders"} swapped`,
            nothing: "No loader was swapped",
            left: "Not swapped:",
            failed: "The loaders could not be swapped",
        },
        widgets: {
            auto: "auto",
            off: "off",
            on: "on",
            more: count => `Show advanced (${count})`,
            less: "Hide advanced",
        },
        sockets: {
            mismatch: (from, to) => `${from} cannot be connected to ${to}`,
            use: names => `Use ${names} here.`,
            or: ", or ",
            load: (loader, type) => `Or load the same file with ${loader}, whose ${type} fits here and runs on all ranks too.`,
            need: loader => `It takes the output of ${loader}.`,
        },
    },
    zh: {
        adopt: {
            adopt: "替换加载器，在所有 rank 上运行（昇腾）",
            back: "换回核心加载器（昇腾）",
            swapped: count => `已替换 ${count} 个加载器`,
            nothing: "没有可替换的加载器",
            left: "未替换：",
            failed: "无法替换加载器",
        },
        widgets: {
            auto: "自动",
            off: "关闭",
            on: "开启",
            more: count => `显示高级选项（${count}）`,
            less: "隐藏高级选项",
        },
        sockets: {
            mismatch: (from, to) => `${from} 不能连接到 ${to}`,
            use: names => `请改用${names}。`,
            or: "或",
            load: (loader, type) => `也可以用${loader}加载同一文件，其输出 ${type} 可接在这里，同样在所有 rank 上运行。`,
            need: loader => `此处需要${loader}的输出。`,
        },
    },
}
