"""Plain English nouns that the tasks hide, assign and count: short, common, none the beginning of another."""

_TEXT = """
anchor apron arrow badge bakery ballot banjo barrel basket beacon bicycle blanket bonnet bottle branch bridge bronze
bucket butter button cabin camera candle canoe carpet castle cellar cherry chimney circle clover coffee collar comet
copper cotton cradle crystal curtain dagger daisy desert dinner dolphin donkey dragon drawer eagle engine falcon
farmer feather fiddle finger flame flower forest fossil fountain garden garlic ginger glacier glove goose grape hammer
harbor hazel helmet honey horse island ivory jacket jewel jungle kettle kitchen ladder lantern lemon lettuce library
lizard lobster magnet maple marble market meadow melon mirror monkey mountain mustard napkin needle nickel oasis olive
onion orange orchard otter oyster paddle palace panther paper parrot pencil pepper piano pigeon pillow planet pocket
pony potato puppet quartz quilt rabbit radish ribbon river rocket saddle salmon sandal scarf school shadow shovel
silver sister spider spoon squirrel stable statue stream summer sunset table teapot temple thunder ticket tiger timber
tomato tower trumpet tulip tunnel turtle umbrella valley velvet village violin wagon walnut whistle willow window
winter wizard yellow zebra
"""
WORDS = tuple(_TEXT.split())
"""In alphabetical order, all lower case."""
