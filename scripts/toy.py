from guided_diffusion.commands.toy import main

if __name__ == "__main__":
    main()
