"""The phrases that `street_renderer.prompt_reader` matches, by topic and value.

Phrases are singular, in lower case, separated by commas, with spaces for hyphens. A phrase may be
in several tables ("snowplow" is a truck, and snow). Within a topic the longest phrase is
matched and the shorter ones inside it are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Season = Literal["spring", "summer", "autumn", "winter"]
Viewpoint = Literal["car", "sidewalk", "low", "high"]
Bustle = Literal["quiet", "busy"]

CLASS_WORDS: Mapping[str, str] = {
    "road": """road, street, avenue, boulevard, highway, motorway, freeway, expressway, lane,
        alley, interstate, autobahn, autostrada, carriageway, parkway, asphalt, tarmac,
        cobblestone, cobbles, cobbled, intersection, crossroads, junction, roundabout, crosswalk,
        crossing, zebra crossing, level crossing, railway crossing, railroad crossing, overpass,
        ring road, bus lane, bike lane, bicycle lane, cycle lane, roadway, thoroughfare, flyover,
        underpass, on ramp, off ramp, slip road, cul de sac, driveway, backstreet, railroad""",
    "sidewalk": """sidewalk, pavement, footpath, footway, walkway, promenade, kerb, curb,
        boardwalk, esplanade""",
    "building": """building, house, skyscraper, tower, facade, façade, shop, shopfront,
        storefront, church, cathedral, warehouse, factory, office, school, mosque, temple, villa,
        cottage, bungalow, hotel, cafe, café, restaurant, kiosk, barn, farmhouse, townhouse,
        rowhouse, high rise, skyline, chapel, town hall, city hall, tower block, apartment,
        apartment block, office block, flats, gas station, petrol station, filling station,
        castle, palace, bakery, pharmacy, shophouse, brownstone, tenement, mall, supermarket,
        mansion, library, museum, hall, gable, chalet, train station, railway station, bus
        station, tram depot, bus depot, fire station, diner, garage, hospital, pub, bar, store,
        department store, market hall, mill, silo, shed, grain elevator, minaret, pagoda,
        theatre, theater, cinema, farmyard, post office, barracks, stadium, steelworks, hut, homes,
        laundromat, motel, lighthouse, roof, rooftop, porch, balcony, block of flats, arcade,
        refinery, power station, power plant, bookshop, workshop, dwelling, terrace of houses""",
    "wall": """wall, brick wall, stone wall, concrete wall, retaining wall, garden wall, noise
        barrier, sound barrier, noise wall, harbour wall, harbor wall, sea wall, seawall, quay
        wall, flood wall, city wall, boundary wall, dry stone wall, drystone wall, walled""",
    "fence": """fence, fencing, railing, iron railings, picket fence, chain link, chain link
        fence, palisade, wire fence, wooden fence, mesh fence, hoarding, chainlink""",
    "pole": """pole, lamp post, lamppost, street lamp, street light, streetlight, streetlamp,
        utility pole, telegraph pole, telephone pole, power pole, flagpole, lamp standard,
        lighting mast, mast, signpost, lantern post, sign post, street lantern, traffic light
        pole, light pole, catenary mast, pylon, bollard""",
    "traffic light": """traffic light, traffic signal, stoplight, stop light, signal light,
        signal head, at a red light, at the red light, at red lights, red light, green light,
        green man, pedestrian signal, pedestrian light, signal, crossing light, traffic light
        pole, turns green, red signal, green signal, light turns red, set of lights""",
    "traffic sign": """traffic sign, road sign, street sign, stop sign, yield sign, give way
        sign, speed limit sign, speed limit, warning sign, direction sign, directional sign, no
        parking sign, no entry sign, no stopping sign, one way sign, signpost, sign post, sign
        gantry, highway sign, motorway sign, exit sign, parking sign, crossing sign, overhead
        sign, green sign, blue sign, detour sign, no overtaking sign, signage, place name sign,
        overhead gantry, school sign, triangular sign, round sign, route sign, roundabout sign,
        sign board, deer sign, moose sign, kangaroo sign, bus stop sign, roadworks sign, road
        works sign""",
    "vegetation": """tree, bush, hedge, shrub, foliage, palm, palm tree, vegetation, ivy, forest,
        woods, woodland, oak, plane tree, cherry blossom, cherry tree, poplar, pine, conifer,
        willow, birch, cypress, chestnut, linden, lime tree, eucalyptus, jacaranda, flower bed,
        flowerbed, vines, vineyard, blossom, maple, fir, spruce, ash tree, elm, olive grove,
        olive tree, orchard, plants, undergrowth, ferns, hedgerow, greenery, ginkgo, beech,
        acacia, banana trees, bamboo, reeds, wildflowers, mangroves, bougainvillea, planters,
        aspen, redwoods, cacti, cactus, creeper, rhododendron, shrubbery, larch, leafy, tree
        lined, magnolia, larches, thicket, planter, shrubs, crops, corn, maize, sunflowers,
        wisteria, scrub, oleander, hydrangea, moss""",
    "terrain": """terrain, grass, lawn, verge, field, meadow, dirt, sand, soil, hill, mountain,
        gravel, mud, embankment, dune, desert, pasture, grassy, heath, moor, moorland, hillside,
        rock, rocky, cliff, riverbank, slope, farmland, prairie, steppe, rice paddy, paddy,
        earth, front yard, median strip, green median, savanna, plain, ditch, sandbank, valley,
        hilly, peak, front lawn, grassland, scree, bare ground, wasteland""",
    "sky": """sky, cloud, blue sky, clear sky, grey sky, gray sky, overcast sky, cloudy sky,
        storm cloud, rain cloud, dark cloud, starry sky, starry, cloudless, red sky, pink sky,
        orange sky, white sky, open sky, pale sky""",
    "person": """person, people, pedestrian, man, woman, child, kid, boy, girl, crowd, shopper,
        passerby, passersby, passer by, passers by, walker, worker, jogger, runner, commuter,
        vendor, tourist, couple, family, student, schoolchild, schoolchildren, police officer,
        policeman, policewoman, postman, mother, father, grandmother, grandfather, figure,
        passenger, monk, waiter, street sweeper, crossing guard, traffic warden, neighbour,
        neighbor, farmer, onlooker, police, nun, tourist, fan, cook, captain, construction
        worker, nurse, toddler, teenager, businessman, businesswoman, shopkeeper, hiker,
        stroller, lady, gentleman, porter, dog walker, strangers, friends, fishmonger, butcher,
        baker, seller, stallholder, office workers, security guard, patrolman, postwoman,
        flagger, visitors, dockworker, pilgrim, parent, adult, pensioner, somebody, someone,
        docker, bystander, traffic officer, villager, gardener, fisherman, locals, soldier,
        busker, road worker, conductor""",
    "rider": """rider, courier, cyclist, bicyclist, motorcyclist, biker, bike courier, bicycle
        courier, motorcycle courier, bike messenger, delivery rider, scooter rider, motorcycle
        police, motorcycle policeman, motorbike taxi, motorcycle taxi, moped rider, messenger, on
        two wheels, mounted courier, cycle courier, boda boda, ojek, pillion, cycling""",
    "car": """car, automobile, taxi, cab, sedan, van, suv, hatchback, jeep, limousine, minivan,
        station wagon, estate car, police car, vehicle, traffic, convertible, roadster, saloon,
        sports car, ambulance, beetle, coupe, delivery van, camper van, motorist, taxicab,
        windscreen wipers, microcar, compact, tail lights, taillights,
        brake lights, squad car, patrol car, minicab, traffic jam, gridlock, kei car""",
    "truck": """truck, lorry, pickup, pickup truck, pick up, fire engine, fire truck, semi
        trailer, tractor trailer, tanker, dump truck, garbage truck, box truck, delivery truck,
        flatbed, cement mixer, concrete mixer, eighteen wheeler, articulated lorry, dumper, food
        truck, snow plow, snowplow, snow plough, snowplough, tow truck, semi, big rig, bin lorry,
        refuse lorry, truck driver, gritter, plow, road train, refuse truck, tipper, low loader,
        juggernaut, recycling truck, logging truck, hgv, garbage lorry, kei truck, trucker, salt
        spreader, mail truck, milk float""",
    "bus": """bus, coach, minibus, double decker, double decker bus, school bus, trolleybus,
        trolley bus, city bus, night bus, tour bus, articulated bus, bendy bus, shuttle bus,
        jeepney, matatu, sightseeing bus, airport shuttle, marshrutka, dolmus, postbus""",
    "train": """train, tram, streetcar, trolley, trolley car, light rail, light rail vehicle,
        locomotive, metro train, commuter train, subway train, railcar, freight train, goods
        train, cable car, tramcar, elevated train, monorail, railway carriage, boxcar, coal
        wagon, lrv, steam engine, shunter, freight wagon, tank wagon, switcher""",
    "motorcycle": """motorcycle, motorbike, moped, scooter, motor scooter, vespa, motorcyclist,
        motorcycle courier, biker, scooter rider, motorcycle police, motorcycle policeman,
        motorbike taxi, motorcycle taxi, moped rider, dirt bike, sidecar, trail bike, boda boda,
        ojek, pillion, cruiser, sport bike, chopper, superbike, harley""",
    "bicycle": """bicycle, bike, cyclist, bicyclist, cycle, tandem, cargo bike, bike courier,
        bicycle courier, bike messenger, mountain bike, road bike, folding bike, e bike, rental
        bike, cycle courier, pedal, tricycle, racing bike, handlebars, velomobile, push bike,
        bike share, bike rack, cycling""",
}
"""Phrases that name each class. A phrase may name several classes."""

WEATHER_WORDS: Mapping[str, str] = {
    "clear": """clear sky, clear day, clear night, clear morning, clear evening, clear afternoon,
        clear weather, clear air, clear winter, clear autumn, clear spring, clear summer, clear,
        clear dawn, sunny, sunshine, sunlit, sunlight, blue sky, cloudless, starry sky, starry,
        sun, bright morning, no clouds, not a cloud, without a cloud, moonlit, sun drenched,
        sunbaked, golden light, golden evening, golden hour, brilliant, dazzling, glare, glaring,
        sunset, sunrise, bright day, bright noon, bright winter, bright summer, bright spring,
        sunbeam, bright afternoon, midday heat, evening light, starlight, sun bleached, heat,
        heatwave, fine weather""",
    "overcast": """overcast, cloudy, grey sky, gray sky, overcast sky, cloudy sky, clouded,
        leaden, heavy cloud, low cloud, dull light, dull, dark cloud, gloomy, white sky, flat
        light, dreary, broken cloud, thunder cloud, heavy sky, grey daylight, gray daylight,
        thick cloud, storm cloud, grey day, gray day, grey afternoon, gray afternoon, grey
        morning, gray morning, drab, flat grey light, grey winter, cloud cover, diffuse light,
        grey light, gray light, sunless, grey clouds, gray clouds""",
    "rain": """rain, rainy, raining, drizzle, drizzly, downpour, wet, rainstorm, shower, storm,
        thunderstorm, monsoon, umbrella, puddle, rain soaked, rain slick, rain slicked,
        cloudburst, raindrop, soaked, sodden, raincoat, drizzling, pouring, drenched, typhoon,
        rain cape, stormy, rainwater, rain cloud""",
    "fog": """fog, foggy, mist, misty, haze, hazy, smog, smoggy, murk, fogbound, sea fret, fog
        bank, freezing fog, low visibility, poor visibility""",
    "snow": """snow, snowy, snowing, snowfall, sleet, blizzard, slush, slushy, snow covered,
        snowbank, snowflake, snowstorm, snowdrift, snowbound, snowed, powder snow, flurry,
        flurries, snow plow, snowplow, snow plough, snowplough, snowed in, snowman""",
}

TIME_WORDS: Mapping[str, str] = {
    "day": """day, daytime, daylight, noon, midday, morning, afternoon, lunchtime, broad
        daylight, midmorning, lunch hour""",
    "dusk": """dusk, dawn, sunset, sunrise, twilight, golden hour, blue hour, evening, nightfall,
        first light, daybreak, night falls, sundown, last light, low sun, setting sun, rising
        sun, early light, gloaming, sun sets, sun comes up, sun goes down""",
    "night": """night, nighttime, midnight, moonlit, moonlight, after dark, late evening, starry,
        starry sky, small hours, three in the morning, darkness, pitch dark, two in the morning,
        starlight, stars, four in the morning, one in the morning""",
}
TIME_HINTS: Mapping[str, str] = {
    "day": "sunny, sunshine, blue sky, cloudless, heat, glare, daylight, bright winter, sunlit",
    "night": "neon, moon, headlights, neon sign",
    "dusk": "pink sky, red sky, orange sky, golden light, evening light",
}

PLACE_WORDS: Mapping[str, str] = {
    "downtown": """downtown, city centre, city center, business district, financial district,
        inner city, town centre, town center, metropolis, central square, main square, town
        square, manhattan, city square, theatre district, central business district, midtown, big
        city""",
    "street": """narrow street, old town, market street, shopping street, side street, alley,
        bazaar, chinatown, high street, back street, backstreet, medieval, old quarter, one way
        street, street market, night market, cobbled street, narrow lane, steep street, old city,
        back lane, main street, town street, cobblestone street, alleyway, café street, souk,
        covered market, flower market, fish market, market town, old streets, market square""",
    "residential": """residential, suburb, suburban, suburbia, neighbourhood, neighborhood,
        housing estate, cul de sac, bungalow, row houses, rowhouse, terraced houses, terraced,
        villa, driveway, semi detached, detached houses, residential street, garden city,
        housing, homes, council estate, housing block, townhouse, brownstone, block of flats,
        bedroom community, apartment block, tower block, prefab""",
    "avenue": """avenue, boulevard, tree lined, ring road, dual carriageway, esplanade, wide
        street, broad street, parkway, promenade, seafront, arterial road, wide road, multi lane
        road, arterial, waterfront road, seafront road, thoroughfare, embankment road""",
    "highway": """highway, motorway, freeway, expressway, interstate, autobahn, autostrada,
        carriageway, toll plaza, slip road, on ramp, off ramp, motorway bridge, toll booth, toll
        road, flyover, beltway, turnpike""",
    "rural": """rural, country road, countryside, village, farm, farmland, mountain road,
        mountain pass, coastal road, coast road, dirt road, forest road, country lane, gravel
        road, desert road, valley road, hill road, farm road, alpine, pass road, farm track, two
        lane blacktop, backcountry, outback, pampas, sunken lane, hamlet, mountain village,
        hairpin, woodland road, island road, track through, canyon road""",
    "industrial": """industrial, factory, warehouse, harbour, harbor, docks, dockside, port,
        container terminal, refinery, logistics, business park, railway yard, rail yard, freight
        yard, power plant, power station, steelworks, shipyard, cement works, trading estate,
        industrial estate, industrial park, goods yard, sawmill, quarry, coal yard, scrapyard,
        industrial area, loading dock, depot, mill, container port, grain elevator, foundry,
        distribution centre, distribution center, brickworks, sugar mill, chemical plant""",
}
PLACE_HINTS: Mapping[str, str] = {
    "downtown": """skyscraper, high rise, office, skyline, department store, billboard, neon,
        office block, city hall, office tower, cathedral""",
    "street": "cobbled, cobblestone, cobbles, shop, shopfront, storefront, café, cafe, market",
    "residential": """front yard, garden, lawn, picket fence, school, front garden, cottage,
        porch, playground, front lawn""",
    "avenue": "median strip, palm, palm tree, green median, plane tree",
    "rural": """field, meadow, vineyard, forest, pasture, orchard, desert, olive grove, moor,
        moorland, paddy, rice paddy, barn, farmhouse, tractor, prairie, steppe, farmer""",
    "industrial": "shipping container, crane, chimney, silo, container",
    "highway": "overpass, sign gantry, eighteen wheeler, exit sign, gantry, overhead gantry",
}

SEASON_WORDS: Mapping[str, str] = {
    "spring": "spring, springtime, in march, april, in may, cherry blossom, blossom",
    "summer": "summer, summertime, midsummer, june, july, august, heatwave",
    "autumn": """autumn, autumnal, in fall, in the fall, fall foliage, fall colors, fall colours,
        fallen leaves, october, november, autumn leaves, fall afternoon, fall morning, late fall,
        golden leaves, red leaves, yellow leaves, fall day, september""",
    "winter": """winter, wintry, midwinter, christmas, january, february, december, frost,
        frosty, icy""",
}
SEASON_HINTS: Mapping[str, str] = {
    "winter": """snow, snowy, snowing, snowfall, sleet, blizzard, slush, snow covered, snowbank,
        bare trees, bare branches, snowstorm""",
    "summer": "midday heat, sunbaked, sunflowers, heat",
}

VIEWPOINT_WORDS: Mapping[str, str] = {
    "car": """dashcam, dash cam, dashboard, dashboard camera, windscreen, windshield, behind the
        wheel, through the windscreen, from a car, from the car, car window, driver's view,
        driver's seat, driver's point of view, driver's perspective, from a moving car, from the
        driver, over the bonnet, over the hood, passenger seat, front seat, side window, car
        camera, wing mirror, as a driver sees, from inside a car, through the wet glass, seen by
        a driver, seen from the cab, from a taxi, from the driver's""",
    "sidewalk": """from the sidewalk, from the pavement, from the curb, from the kerb, from a bus
        stop, standing on the corner, from the corner, from the footpath, from a doorway, from a
        café table, standing on the sidewalk, across the street, from the tram stop, from the bus
        stop, from a tram stop, from the roadside, from the verge, at eye level""",
    "low": """low angle, low viewpoint, close to the ground, just above the asphalt, from ground
        level, worm's eye, low down, from knee height, low camera""",
    "high": """from a footbridge, from the footbridge, from a bridge, from above, from the top
        deck, upper deck, from a balcony, from the overpass, high viewpoint, looking down on,
        looking down from, elevated view, from an upstairs window, from a first floor window,
        from the roof, from a truck cab, top deck""",
}

BUSTLE_WORDS: Mapping[str, str] = {
    "quiet": "quiet, deserted, sleepy, lonely, calm, peaceful, silent, abandoned, empty, sparse",
    "busy": """busy, crowded, bustling, rush hour, traffic jam, gridlock, heavy traffic, packed,
        congested, hectic, teeming, dense traffic, lively, jammed, crowd, queue, chaotic,
        thronged, stream of, stop and go""",
}

NEUTRAL = """bus stop, bus shelter, bus timetable, tram stop, tram shelter, tram rails, tram
    track, tram wires, tram line, tram platform, train track, train line, streetcar track,
    streetcar wires, bike path, bicycle path, cycle path, truck stop, car park, car door, car
    horn, kick scooter, e scooter, snow capped, snowcapped, snowy peaks, snow white, sun faded,
    day old, all night, all day, weekday, one day, person hole, sky blue, tree house, wall clock,
    wall to wall, wet market, dust storm, sand storm, wet grass, sand coloured, sand colored,
    brick red, grass green, rock concert, rock music, clear of, clear view, no doubt, no longer,
    no more, no wider, no bigger, no taller, bus route, bus driver, train driver, tram driver,
    walled in, field of view, trolley wires, city buses only, hill of rubbish, shopping trolley,
    luggage trolley, signal box, street performer, street food, street art, road works,
    roadworks, house number, cherry red, sea of, plain clothes, rock salt, bank of, banks of, man
    made, car wash, in the shade of, train bridge, railway bridge, bus roof"""
"""Phrases without a value whose words would otherwise match a shorter phrase."""

ALSO_EXCLUDED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("traffic", "vehicle"), ("car", "truck", "bus", "train", "motorcycle")),
    **dict.fromkeys(("people", "person"), ("person", "rider")),
}
"""Further classes that "no traffic" and "no people" exclude."""
