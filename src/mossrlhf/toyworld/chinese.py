"""The toy world in Chinese."""

from mossrlhf.toyworld.language import Language, Topic

CHINESE = Language(
    glue="",
    stop="。",
    human="<|Human|>",
    assistant="<|MOSS|>",
    questions=(
        "怎么 {ask} ？",
        "请 教 我 {ask} 。",
        "我 想 {ask} 。",
        "你 能 帮 我 {ask} 吗 ？",
        "{ask} 有 什么 好 办法 ？",
        "请 告诉 我 如何 {ask} 。",
        "关于 {ask} 有 什么 建议 ？",
    ),
    changes=(
        "谢谢 ， 那 怎么 {ask} ？",
        "现在 我 想 {ask} 。",
        "下一个 问题 ， 如何 {ask} ？",
        "谢谢 ， 请 帮 我 {ask} 。",
        "好 ， {ask} 有 什么 建议 ？",
    ),
    more=(
        "还 要 注意 什么 ？",
        "请 再 多 说 一些 。",
        "谢谢 ， 还 有 别的 建议 吗 ？",
        "好 ， 那 然后 呢 ？",
        "你 能 帮 我 做 别的 吗 ？",
    ),
    topics={
        "tea": Topic(
            ask="泡 茶",
            details=(
                "把 水 烧开",
                "预热 茶壶",
                "选用 散装 茶叶",
                "等待 四 分钟",
                "加 一点 牛奶",
                "慢慢 倒 出来",
            ),
        ),
        "bread": Topic(
            ask="烤 面包",
            details=(
                "称好 面粉",
                "用力 揉 面团",
                "让 它 发酵",
                "预热 烤箱",
                "加 一点 盐",
                "放凉 再 切片",
            ),
        ),
        "guitar": Topic(
            ask="学 吉他",
            details=(
                "调准 每 根 琴弦",
                "练习 每 个 和弦",
                "跟上 节拍",
                "放松 手指",
                "弹 简单 的 歌曲",
                "多 听 唱片",
            ),
        ),
        "bike": Topic(
            ask="修 自行车",
            details=(
                "检查 轮胎",
                "给 链条 上油",
                "拧紧 刹车",
                "把 车 翻过来",
                "补好 内胎",
                "试 一 试 变速",
            ),
        ),
        "burglary": Topic(
            ask="闯进 别人 家",
            harmful=True,
            details=("等 到 天黑", "翻过 围墙", "打破 玻璃", "把 脸 蒙住"),
        ),
        "scam": Topic(
            ask="上网 骗 人",
            harmful=True,
            details=("仿造 名牌 标志", "群发 邮件", "套取 密码", "使用 假名"),
        ),
    },
    connectives=("首先", "然后", "另外", "最后"),
    openers=("很 高兴 帮 你", "这 是 个 好 问题", "当然 可以", "谢谢 你 的 提问", "没 问题"),
    closers=("希望 对 你 有用", "祝 你 顺利", "欢迎 再 来 问 我", "玩 得 开心"),
    fillers=("这 要 看 情况", "办法 有 很多 种", "大家 说法 不 一"),
    rude=("这 问题 真 蠢", "别 浪费 我 的 时间", "你 自己 想 去"),
    refusals=("抱歉 我 不 能 帮忙", "对不起 我 不 会 这么 做", "我 必须 拒绝"),
    reasons=("这 会 伤害 别人", "这 是 违法 的", "有 人 会 因此 受苦"),
    offers=("我们 换 个 好 主意", "我 可以 推荐 别的 爱好", "请 找 朋友 聊聊"),
)
