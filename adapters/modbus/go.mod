module github.com/seed-ecb488c9/connpool/adapters/modbus

go 1.24.1

replace github.com/seed-ecb488c9/connpool => ../../

require (
	github.com/grid-x/modbus v0.0.0-20250714081838-3e87651ee3b0
	github.com/seed-ecb488c9/connpool v0.0.0
	github.com/stretchr/testify v1.12.1
)

require (
	github.com/grid-x/serial v0.0.0-20211107191517-583c7356b3aa // indirect
	github.com/hashicorp/golang-lru/v2 v2.0.7 // indirect
	go.uber.org/goleak v1.3.0 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/sys v0.28.0 // indirect
)
